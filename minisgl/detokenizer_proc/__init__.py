"""The detokenizer process: token ids in, text out, as each token arrives.

In: TokenBatch (one message a step) and RequestError from the schedulers. Out: DeltaBatch and RequestError to http,
AbortRequest to the scheduler whose request a stop string has ended. It owns the text of every running request:
incremental decoding, stop strings, and the finish reason the client sees.
"""
