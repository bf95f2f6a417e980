"""What people type; one module per noun; no logic of its own."""
