"""Jobs on a server: sent, waited for, picked up again."""
