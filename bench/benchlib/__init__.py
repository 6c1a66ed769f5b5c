"""What the benchmark scripts share: workloads, one client for every server, statistics, server start, reports.

workloads.py  what is asked: prompts of exact lengths, shared prefixes, conversations, Poisson arrivals
wires.py      how each server is asked and how its stream is read: tokens counted by the server's own ids
client.py     one HTTP/1.1 connection that stamps what arrives
load.py       client processes that put a load on one server
stats.py      percentiles and the latencies of one request
servers.py    start, readiness, versions and end of minisgl, the Hugging Face baseline and sglang
hf_server.py  the Hugging Face baseline
inprocess.py  the three systems without HTTP
bandwidth.py  copy bandwidth of the device, bytes one decode step must move
results.py    one measured point, and when it is refused
report.py     JSON and Markdown
plots.py      pictures
anatomy.py    the hops of a request from client to client, and its Perfetto trace
"""
