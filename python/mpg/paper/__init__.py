"""The paper's methods, and the measurements of what samplers deliver."""
