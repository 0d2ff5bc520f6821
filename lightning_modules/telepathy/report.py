"""placeholder"""
class Examination:
    def __init__(self,name): pass
