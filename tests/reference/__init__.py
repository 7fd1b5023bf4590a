"""Slow, obvious versions of what Tuanyuan does: an oracle that shares no code with the product.

events       what a log holds, one ping at a time
matcher      the 15 matching rules, all devices in one dict, no cells, no batches
file_merge   an offline run over files
choices, places, generator, file_generator    adversarial logs and files, from a seed or from Hypothesis
worked_examples (examples/)                   logs whose pushes were worked out by hand
"""
