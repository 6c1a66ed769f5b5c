"""Whole steps on x86 CPUs with AMX: one compiled function that a team of threads runs.

Read memory.py (what there is), step.py (the phases of a step), products.py, tiles.py and attention.py (what the phases
do), team.py (who does it); intrinsics.py, numbers.py and compiler.py are the vocabulary. tiled_decoder.py brings a
model here, step_batch.py its batches.
"""
