"""For authors of strategies: tiny models, the masked reference, `assert_equivalent`, and the contract of a strategy."""
