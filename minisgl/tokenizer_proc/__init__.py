"""The tokenizer process: prompts in, token ids out, each to one of the replicas.

In: GenerateRequest and AbortRequest from http. Out: TokenizedRequest and AbortRequest to the schedulers; Dispatched and
RequestError to http. It owns the tokenizer, the chat template, the check against the context length, and the choice
of the replica. It keeps no state of a request once a replica has it.
"""
