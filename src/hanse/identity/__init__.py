"""Who is who: certificates, the authority that issues them, join tokens, signatures, and the kit folder that holds a participant's."""
