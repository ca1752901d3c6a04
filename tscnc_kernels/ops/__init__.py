"""The ops, one file each: formula, checks, reference, fakes, autograd Function, public function."""
