"""Published names of weights to ours and back, with reports of what fit."""
