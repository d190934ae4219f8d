"""The tests. This file makes ``tests`` this folder also where verl is installed, which brings a package so named."""
