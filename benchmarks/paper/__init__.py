"""The paper's claims on real data: ``python -m benchmarks.paper``, and the page that its results make."""
