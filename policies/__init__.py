"""Recovery policies, one file each: `make(**kwargs) -> RecoveryPolicy`."""
