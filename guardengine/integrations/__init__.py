"""Where other software's streams, loops and objects meet guardengine. Nothing here is imported by the rest."""
