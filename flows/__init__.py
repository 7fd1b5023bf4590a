"""The dataflow and its I/O: log, wire, queues, desk relay, replay."""
