"""The worked examples, by what they are about; `tests.reference.worked_examples` gathers them."""
