"""Models and what is done to them: build, packed attention, quantize, adapt, head and loss, memory, hardware."""
