"""Models of this package inside other people's frameworks; each module imports its framework, nothing else does."""
