"""Load tests on Locust: what a deployment holds, what gives way first, and whether anybody was missed meanwhile.

    feeder process ──requests made ahead, each with the moment it is due──> senders ──HTTP or log──┐
    officers (publish, edit, close) · readers (take, acknowledge) · operators and map apps ───────>├─ the deployment
    watch: lag, queues, memory, CPU of system and generator, once a second <───────────────────────┘
    conductor: fills, begins, steps up, drains, asks the audit, writes the report

`loadtest/locustfile.py` registers all of it with Locust; `python -m loadtest` starts a system of its own and runs that.

scenarios, plan         what is to happen, by name; when, and at which rate
spec, deployment        one run, as it travels to workers; what it runs against
sources, feeder         pings from a world or a file, turned into requests ahead of their time, in a process of its own
traffic, senders        the worker's end: whoever has a connection free sends the next request that is due
readers, officers, onlookers    the other users
recorder, histogram     every event by name and second; what travels from workers to the master
watch, conductor        the master's work; drain, accounts: the end of a run
verdict, report, plots, compare     what is made of it
local_system, faults    a system on this machine, and what kills parts of it
"""

from tuanyuan import kernel_cache

kernel_cache.use()  # before any module here imports one with kernels
