"""Imported once by the process that flows are forked from: they then start with every kernel in memory."""

from tuanyuan.warmup import run_every_kernel

run_every_kernel()
