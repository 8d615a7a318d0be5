"""Looking at what was learned: numbers first, then figures."""
