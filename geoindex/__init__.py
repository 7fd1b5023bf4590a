"""Pure geospatial matching: arrays in, arrays out. No I/O, no clock, no environment."""
