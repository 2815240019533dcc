"""Released unified models, in: Chameleon (Anole) and Emu3. Janus is refused, and says why."""
