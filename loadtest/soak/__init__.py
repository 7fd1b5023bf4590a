"""Faults on purpose: a small real deployment, everything that can go wrong with it, and a full account at the end.

    sender ──> logs ──> flow process(es) ──> queues ──> partners             a real server, real processes
    officers ──> desk ──^
                  ^
            a scenario breaks something, again and again; then a quiet phase, then `accounts`

`table` names every line of the fault table once, with its small size (a test) and its long one (`tuanyuan soak`).
"""
