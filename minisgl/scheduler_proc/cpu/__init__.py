"""Decode and prefill on x86 CPUs with AMX: a whole step as one compiled function that a team of threads runs."""
