"""Files made in memory, tiny models of every part, and what they must give: loops in float64 from the definitions."""
