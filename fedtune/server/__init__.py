"""The server: rounds, clients, the clock, and what is written down."""
