"""Benchmarks: the same code small in the tests and large by `tuanyuan bench`.

    traffic       the population and its pings, the active alerts: the same for all
    brute_force   who should have been told what, by another way than the one that is measured
    inside        what a shard machine knows of a device, read out for comparison
    live          a server and flow processes in a folder of their own
    sender        a process that appends pings at a rate
    report        what a benchmark found: one JSON object, one table, the goals
    plots         pictures of several reports

    kernel · growth · memory                                        one shard machine in this process
    flow · sustained · fanout · latency · coldstart · idle          server and flow
    peers                                                           others beside us, on the same pings

Every benchmark verifies what it measured: totals against an independent count, devices against brute force. A number
whose work was not verified is no number.
"""
