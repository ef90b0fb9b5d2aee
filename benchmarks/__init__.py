"""What recording costs: ``python -m benchmarks.overhead`` measures it and reports it."""
