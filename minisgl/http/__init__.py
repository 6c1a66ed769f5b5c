"""The HTTP process: where a request enters the ring and where its answer leaves it.

In: HTTP from clients; DeltaBatch and RequestError from the detokenizer (RequestError and Dispatched from the
tokenizer); WorkerUp, WorkerDown, Health, Drain and Shutdown from the supervisor.
Out: HTTP responses; GenerateRequest and AbortRequest to the tokenizer.
Owns: the table of requests in flight, and with it what becomes of them when a worker dies.

Read in this order: main.py (wiring), app.py (routes), native.py (POST /generate), generation.py (what every API makes
of a body), streaming.py (the request table and its dispatcher), answers.py (events to a response), writer.py (bytes to
one client), recovery.py (the rules after a death). The other APIs are openai.py and sglang.py, their answers *_wire.py;
structured.py reads what an answer must match, logprobs.py what the ring says of probabilities;
chats with tools and reasoning add tools.py (what a request says of them) and message_parser.py (what is in an answer).
"""
