"""The program under a virtual clock and a seeded adversary, against oracles (docs/decisions/0006-simulator.md)."""
