"""Whole steps on x86 CPUs with AMX or AVX512-BF16: one compiled function that a team of threads runs.

Read memory.py (what there is), step.py (the phases of a step), products.py and attention.py (what the phases do),
screening.py (how most of the head need not be read), team.py (who does it). tiles.py is how matrices lie in memory,
narrow.py how they take less of it, instructions.py what multiplies them: amx.py or avx512.py. intrinsics.py, numbers.py
and compiler.py are the vocabulary. tiled_decoder.py brings a model here, step_batch.py its batches.
"""
