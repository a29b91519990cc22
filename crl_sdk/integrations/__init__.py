"""The SDK on the engines that users run already: one package for each of them."""
