"""One machine alive is one worker process, which wires the rooms and owns start, reset and stop."""
