"""Load generation: a seeded world of phones."""
