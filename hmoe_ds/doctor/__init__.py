"""`hmoe doctor`: what this machine has for pretraining, what is missing, the mend."""
