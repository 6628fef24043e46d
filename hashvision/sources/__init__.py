"""Photos wherever they lie: opened, checked and decoded, by one decoder for every command."""
