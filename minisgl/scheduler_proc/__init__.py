"""The scheduler process: token ids in, generated token ids out. One process per device (replica).

In: TokenizedRequest and AbortRequest from the tokenizer, AbortRequest (stop string found) from the detokenizer.
Out: TokenBatch, one per step, and RequestError, to the detokenizer of each request.
Owns: the device, the model's weights, the KV cache, and every request from its arrival to its last token.

    main.py       the process: inbox -> core -> detokenizers
    core.py       one replica: scheduler + engine, step by step; also behind minisgl.Engine
    scheduler.py  decides each step (admission, batching, preemption, finishing); knows nothing of torch
    limits.py     what bounds it; pacing.py: how much prompt a step takes beside running streams
    request.py    the border between the two: Request, StepPlan
    kv_pages.py   which KV pages are free
    engine.py     runs a StepPlan on the device and returns one token per sampling row
    compute_path.py  which code computes the steps: the two that follow, or plain torch
    cpu/          whole steps on x86 CPUs with AMX or AVX512-BF16
    cuda_graphs.py  the engine's CUDA path: steps as captured graphs; graph_sizes.py: which of them, in which order
    decode_rows.py  what decode graphs read, kept on the device; prefill_rows.py: what prefill graphs do, sent by
                  input_block.py; step_results.py: where both leave their tokens
    sampler.py    logits -> token ids, each row by its own parameters; device_sampler.py: the same by kernels on CUDA
    grammar.py    one request's grammar: which tokens may come next; json_schema.py: schemas as xgrammar enforces them
    grammar_compiler.py  compiles grammars beside the loop, in grammar_server.py, a process of its own
    device.py     where the model runs, in which precision; kv_sizing.py: how many KV pages it gets
    models/       config.json and weights -> the forward pass of a step
    attention/    the KV pool, and attention over its pages
    kernels/      Triton kernels; compile_ahead.py compiles them side by side at the start, with the processes of
                  kernel_compilers.py on a machine that has none of them yet
"""
