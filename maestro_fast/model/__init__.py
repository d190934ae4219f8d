"""What is read off a policy network: hidden states, log-probs, attention, the reference policy."""
