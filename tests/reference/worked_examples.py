"""Logs and the pushes they must give, worked out by hand from the rules: for the reference and for the product.

for example in EXAMPLES:
    pushes = whatever_runs(example.settings, example.events)
    assert by_device_and_alert(pushes) == by_device_and_alert(example.expected_pushes)
"""

from __future__ import annotations

from tests.reference.examples import lifecycle, pings, rings
from tests.reference.examples.builders import Example

__all__ = ["EXAMPLES", "Example"]

EXAMPLES: list[Example] = [*pings.EXAMPLES, *rings.EXAMPLES, *lifecycle.EXAMPLES]
