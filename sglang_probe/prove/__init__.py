"""`sglang-probe prove`: whether what the probe records is right on this machine, and the certificate that says so."""
