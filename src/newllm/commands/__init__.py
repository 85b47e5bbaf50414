"""What a command does beyond one call into the library: flags from settings, streaming text, tables in the terminal."""
