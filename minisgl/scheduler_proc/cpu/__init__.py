"""Whole steps on x86 CPUs with AMX: one compiled function that a team of threads runs.

Read memory.py (what there is), step.py (the phases of a step), tiles.py and attention.py (what the phases do), team.py
(who does it); intrinsics.py and numbers.py are the vocabulary. tiled_decoder.py brings a model and its batches here.
"""
