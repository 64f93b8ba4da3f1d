"""A bound on the headers of a tar: tarfile reads a long name or a block of attributes whole, whatever size a header claims."""

import tarfile

MOST = 2**20  # bytes of one long name or block of attributes; the longest path of Linux has 4096

_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


class Bounded(tarfile.TarInfo):
    """tarfile.open(..., tarinfo=Bounded) raises ReadError where an extended header claims more than MOST bytes."""

    def _proc_member(self, tarfile_):
        if self.type in _EXTENDED and self.size > MOST:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes, more than {MOST:,}")
        return super()._proc_member(tarfile_)  # pyright: ignore[reportAttributeAccessIssue]
