"""The public algorithms in plain torch: what tests and benches compare with."""
