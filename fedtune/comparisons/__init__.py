"""Methods x codecs x seeds as runs in one folder, each by the same rules."""
