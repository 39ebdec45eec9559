"""What a budget of risk promises, and what it saves."""
