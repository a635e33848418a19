"""The larger commands, by what they are for; `cli` has the small ones and the group. Each parses, calls once, prints."""
