"""What every benchmark program shares: one timer, one place that counts work, one set of variants, one form of result row."""
