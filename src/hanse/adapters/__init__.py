"""On the rim: one module a framework, found by entry point and imported only when a value of that framework shows up."""
