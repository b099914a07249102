"""The equations in plain PyTorch, any dtype: oracle of the tests, fallback of the ops, baseline of the benchmarks."""
