"""Published benchmarks: data format, protocol and score."""
