"""One volume of a chest with a bright ball in the left front, and the containers that programs put it in."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless
from pydicom.uid import RLELossless, generate_uid


def chest() -> np.ndarray:
    """HU (x to the left, y to posterior, z to the head)."""
    x, y, z = np.mgrid[:128, :112, :10]
    hu = np.full(x.shape, -1000, np.int16)
    hu[((x - 64) / 55) ** 2 + ((y - 56) / 45) ** 2 < 1] = 40
    for centre in (40, 88):
        hu[((x - centre) / 18) ** 2 + ((y - 56) / 30) ** 2 < 1] = -800
    hu[((x - 88) * 2.2) ** 2 + ((y - 40) * 2.2) ** 2 + ((z - 5) * 5.0) ** 2 < 15**2] = 300
    return hu


HU = chest()
RAS = np.array([[-2.2, 0, 0, 140], [0, -2.2, 0, 123], [0, 0, 5, -1000], [0, 0, 0, 1]])
CENTRE = RAS @ [88, 40, 5, 1]  # of the ball
CONTAINERS: dict[str, Callable[[Path], None]] = {}  # name -> function that writes into a folder


def container(write):
    CONTAINERS[write.__name__] = write
    return write


def nifti(path: Path, values=HU, affine=RAS, kind=nib.Nifti1Image, **header) -> None:
    image = kind(values, affine)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)


def patched(path: Path, places: dict[int, bytes]) -> None:
    """Write other bytes into a file."""
    content = bytearray(path.read_bytes())
    for place, value in places.items():
        content[place : place + len(value)] = value
    path.write_bytes(content)


CONTAINERS |= {
    "nii": lambda folder: nifti(folder / "x.nii"),
    "nii.gz of float64": lambda folder: nifti(folder / "x.nii.gz", HU.astype(float)),
    "NIfTI-2": lambda folder: nifti(folder / "x.nii.gz", kind=nib.Nifti2Image),
    "capitals": lambda folder: nifti(folder / "x.nii") or (folder / "x.nii").rename(folder / "X.NII"),
    "signs and CJK in the name": lambda folder: nifti(folder / "胸部 #1 @x [2].nii.gz"),
    "4D of one volume": lambda folder: nifti(folder / "x.nii", HU[..., None]),
    "NaN outside": lambda folder: nifti(folder / "x.nii", np.where(HU == -1000, np.nan, HU).astype(np.float32)),
    "below air outside": lambda folder: nifti(folder / "x.nii", np.where(HU == -1000, -3024, HU).astype(np.int16)),
    "-inf outside": lambda folder: nifti(folder / "x.nii", np.where(HU == -1000, -np.inf, HU).astype(np.float32)),
    "wrapped padding outside": lambda folder: nifti(folder / "x.nii", np.where(HU == -1000, 62512, HU).astype(np.int32)),
    "signed called unsigned": lambda folder: nifti(folder / "x.nii", HU.astype(np.uint16)),
    "pair": lambda folder: nifti(folder / "x.hdr", kind=nib.Nifti1Pair),
    "compressed pair": lambda folder: nifti(folder / "x.img.gz", kind=nib.Nifti1Pair),
    "hidden file": lambda folder: nifti(folder / "x.nii") or (folder / "._x.nii").write_bytes(b"\0\5\x16\7" * 99),
}


@container
def big_endian(folder):
    nib.save(nib.Nifti1Image(HU.astype(">i2"), RAS, nib.Nifti1Header(endianness=">")), folder / "x.nii")


@container
def unsigned_with_intercept(folder):
    image = nib.Nifti1Image((HU + 1024).astype(np.uint16), RAS)
    image.header.set_slope_inter(1, -1024)
    nib.save(image, folder / "x.nii")


@container
def slope_zero(folder):
    nifti(folder / "x.nii")
    patched(folder / "x.nii", {112: np.float32([0, 7]).tobytes()})


@container
def sagittal(folder):
    image = nib.Nifti1Image(HU, RAS)
    nib.save(image.as_reoriented(ornt_transform(io_orientation(RAS), axcodes2ornt("PSR"))), folder / "x.nii.gz")


@container
def metres(folder):
    nifti(folder / "x.nii", affine=np.diag([1e-3] * 3 + [1]) @ RAS, xyzt_units=1)


@container
def micrometres(folder):
    nifti(folder / "x.nii", affine=np.diag([1e3] * 3 + [1]) @ RAS, xyzt_units=3)


for _value in (0, np.nan):
    CONTAINERS[f"sform of {_value} beside a qform"] = lambda folder, value=_value: (
        nifti(folder / "x.nii", qform_code=1) or patched(folder / "x.nii", {280: np.full(12, value, "<f4").tobytes()})
    )  # and a code that says that they hold

for _kind in (nib.Nifti1Image, nib.Nifti2Image):
    for _old, _new in (("x.nii.gz", "x.nii"), ("x.nii", "x.nii.gz"), ("x.nii", "x"), ("x.nii.gz", "x.gz"), ("x.nii", "x.dcm")):
        CONTAINERS[f"{_kind.__name__} {_old} named {_new}"] = lambda folder, kind=_kind, old=_old, new=_new: (
            nifti(folder / old, kind=kind) or (folder / old).rename(folder / new)
        )


def itk() -> sitk.Image:
    image = sitk.GetImageFromArray(HU.T.copy())
    image.SetSpacing((2.2, 2.2, 5))
    image.SetOrigin((-140, -123, -1000))
    return image


for _name in ("x.mha", "x.mhd", "x.nrrd", "x.nhdr", "胸部 #1.mha"):
    for _compressed in (False, True):
        CONTAINERS[f"{_name} {_compressed}"] = lambda folder, name=_name, compressed=_compressed: sitk.WriteImage(
            itk(), str(folder / name), compressed
        )
CONTAINERS["x.mha of four axes"] = lambda folder: sitk.WriteImage(sitk.JoinSeries([itk()]), str(folder / "x.mha"))
CONTAINERS["x.nrrd to RAS"] = lambda folder: sitk.WriteImage(sitk.DICOMOrient(itk(), "RAS"), str(folder / "x.nrrd"))


@container
def big_endian_metaimage(folder):
    header = "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = True\nDimSize = 128 112 10\n"
    header += "Offset = -140 -123 -1000\nElementSpacing = 2.2 2.2 5\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    (folder / "x.mha").write_bytes(header.encode() + HU.T.astype(">i2").tobytes())


@container
def metaimage_in_many_files(folder):
    header = "ObjectType = Image\nNDims = 3\nDimSize = 128 112 10\nOffset = -140 -123 -1000\nElementType = MET_SHORT\n"
    names = [f"s{index}.raw" for index in range(10)]
    (folder / "x.mhd").write_text(header + "ElementSpacing = 2.2 2.2 5\nElementDataFile = LIST 2\n" + "\n".join(names) + "\n")
    for index, name in enumerate(names):
        (folder / name).write_bytes(HU[:, :, index].T.tobytes())


@container
def nrrd_to_ras(folder):
    header = "NRRD0004\ntype: short\ndimension: 3\nspace: right-anterior-superior\nsizes: 128 112 10\nendian: little\n"
    header += "space directions: (2.2,0,0) (0,2.2,0) (0,0,5)\nencoding: gzip\nspace origin: (-139.4,-121.2,-1000)\n"
    (folder / "x.nhdr").write_text(header + "data file: x.raw.gz\n")
    (folder / "x.raw.gz").write_bytes(gzip.compress(np.ascontiguousarray(HU[::-1, ::-1].T).tobytes()))


def dicom(z: int, **tags) -> Dataset:
    """Slice z of the volume; a tag of None is removed."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.PatientID, dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "p", "1.2.3", "1.2.3.4"
    dataset.FrameOfReferenceUID, dataset.InstanceNumber, dataset.ImageType = "1.2.3.5", z + 1, ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Modality, dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "CT", "MONOCHROME2", 1
    dataset.Rows, dataset.Columns, dataset.PixelSpacing, dataset.SliceThickness = 112, 128, [2.2, 2.2], 5
    dataset.ImageOrientationPatient, dataset.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-140, -123, -1000 + 5 * z]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    dataset.RescaleIntercept, dataset.RescaleSlope = -1024, 1
    dataset.PixelData = (HU.T[z] + 1024).astype("<u2").tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    return dataset


def dicoms(folder: Path, change=lambda dataset, z: None, name="{}", slices=range(10), **tags) -> None:
    """The slices as one series; `change` may alter each, `name` is that of the files."""
    for z in slices:
        dataset = dicom(z, **tags)
        change(dataset, z)
        path = folder / name.format(z)
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(path, enforce_file_format=True)


def scrambled(*fields):
    return lambda dataset, z: [setattr(dataset, field, generate_uid()) for field in fields]


def stored(dataset, pixels, **tags) -> None:
    dataset.PixelData = pixels if isinstance(pixels, bytes) else pixels.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)


UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
DICOM: dict[str, dict] = {
    "plain": {},
    "signed": {"change": lambda d, z: stored(d, HU.T[z].astype("<i2"), PixelRepresentation=1, RescaleIntercept=0)},
    "negative slope": {
        "change": lambda d, z: stored(d, 99 - HU.T[z], RescaleSlope=-1, RescaleIntercept=99, PixelRepresentation=1)
    },
    "garbage above 12 bits": {
        "change": lambda d, z: stored(d, (HU.T[z] + 1024).astype("<u2") | 0xF000, BitsStored=12, HighBit=11)
    },
    "value in the upper bits": {
        "change": lambda d, z: stored(d, (HU.T[z] + 1024).astype("<u2") << 4, BitsStored=12, HighBit=15)
    },
    "all above the value by mistake": {"BitsStored": 12},
    "no samples, photometric or sign": dict.fromkeys(("SamplesPerPixel", "PhotometricInterpretation", "PixelRepresentation")),
    "modality blank": {"Modality": ""},
    "name with carets": {"change": lambda d, z: setattr(d, "PatientName", "a^b^^^" if z % 2 else "a^b")},
    "implicit": {"change": lambda d, z: setattr(d.file_meta, "TransferSyntaxUID", ImplicitVRLittleEndian)},
    "RLE": {"change": lambda d, z: d.compress(RLELossless, generate_instance_uid=False)},
    "JPEG-LS": {"change": lambda d, z: d.compress(JPEGLSLossless, generate_instance_uid=False)},
    "named png": {"name": "{}.png"},
    "named nii": {"name": "{}.nii"},
    "a folder for each slice": {"name": "{}/IM"},
    "prone": {
        "change": lambda d, z: stored(
            d,
            (HU[::-1, ::-1, z].T + 1024).astype("<u2"),
            ImageOrientationPatient=[-1, 0, 0, 0, -1, 0],
            ImagePositionPatient=[139.4, 121.2, -1000 + 5 * z],
        )
    },
    "numbers from the head": {"change": lambda d, z: setattr(d, "InstanceNumber", 100 - z)},
    "no numbers": {"InstanceNumber": None},
    "series UID scrambled": {"change": scrambled("SeriesInstanceUID")},
    "study UID scrambled": {"change": scrambled("StudyInstanceUID")},
    "all UIDs scrambled": {"change": scrambled(*UIDS)},
    "patient scrambled": {"change": scrambled("PatientID")},
    "all UIDs blank": dict.fromkeys((*UIDS, "PatientID"), ""),
    "all UIDs absent": dict.fromkeys((*UIDS, "PatientID", "SOPInstanceUID")),
    "kernel in every other slice": {"change": lambda d, z: setattr(d, "ConvolutionKernel", "B30f" if z % 2 else "")},
    "frame of reference in some": {"change": lambda d, z: setattr(d, "FrameOfReferenceUID", "1.2" if z > 6 else "")},
    "patient in some": {"change": lambda d, z: setattr(d, "PatientID", "p" if z > 6 else "")},
    "name in some, kernel in others": {
        "change": lambda d, z: stored(d, d.PixelData, PatientName="a^b" * (z % 2), ConvolutionKernel="B30f" * (z < 6))
    },
    "two acquisitions one after the other": {"change": lambda d, z: setattr(d, "AcquisitionNumber", 1 + z // 5)},
    "an acquisition for each slice": {"change": lambda d, z: setattr(d, "AcquisitionNumber", z)},
    "reformatted": {"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED"]},
    "signed called unsigned": {"change": lambda d, z: stored(d, HU.T[z].astype("<i2"), RescaleIntercept=0)},
    "padding without a tag": {
        "change": lambda d, z: stored(d, np.where(HU.T[z] == -1000, 63536, HU.T[z] + np.int32(1024)).astype("<u2"))
    },
}
CONTAINERS |= {f"DICOM {name}": lambda folder, how=how: dicoms(folder, **how) for name, how in DICOM.items()}


@container
def dicom_big_endian(folder):
    for z in range(10):
        dataset = dicom(z, PixelData=(HU.T[z] + 1024).astype(">u2").tobytes())
        dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        dataset.save_as(folder / str(z), implicit_vr=False, little_endian=False, enforce_file_format=True)


for _implicit in (True, False):
    for _name in ("IM{}", "{}.dcm"):
        CONTAINERS[f"DICOM without preamble, {_name}, {_implicit}"] = lambda folder, name=_name, implicit=_implicit: bare(
            folder, name, implicit
        )


def bare(folder, name, implicit):
    for z in range(10):
        dataset = dicom(z)
        dataset.file_meta, dataset.preamble = FileMetaDataset(), None
        dataset.save_as(folder / name.format(z), implicit_vr=implicit, little_endian=True, enforce_file_format=False)


@container
def dicom_without_preamble_but_with_its_header(folder):
    dicoms(folder)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[132:])


@container
def dicom_explicit_that_says_implicit(folder):
    dicoms(folder)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0", 1))


@container
def copies_in_one_folder(folder):
    dicoms(folder)
    for path in list(folder.iterdir()):
        shutil.copy(path, folder / f"copy of {path.name}")


def enhanced(folder, phases=1, mark=lambda frame, phase, z: None):
    """One file of frames in no order, geometry and rescaling in functional groups, each its own; phase n is n HU denser."""
    order = [(phase, z) for z in (3, 1, 0, 2, 9, 8, 4, 5, 7, 6) for phase in range(phases)]
    gone = ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"]
    gone += ["RescaleSlope", "RescaleIntercept"]
    dataset, shared, measures, plane = dicom(0, **dict.fromkeys(gone)), Dataset(), Dataset(), Dataset()
    dataset.NumberOfFrames = len(order)
    dataset.PixelData = b"".join(((HU.T[z] + 1024 + phase) << z % 2).astype("<u2").tobytes() for phase, z in order)
    measures.PixelSpacing, measures.SliceThickness, plane.ImageOrientationPatient = [2.2, 2.2], 5, [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence = [shared], []
    for phase, z in order:
        frame, position, values = Dataset(), Dataset(), Dataset()
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 0.5 if z % 2 else 1, -1024, "HU"
        frame.PixelValueTransformationSequence = [values]
        position.ImagePositionPatient, frame.PlanePositionSequence = [-140, -123, -1000 + 5 * z], [position]
        mark(frame, phase, z)
        dataset.PerFrameFunctionalGroupsSequence.append(frame)
    dataset.save_as(folder / "x", enforce_file_format=True)


CONTAINERS["enhanced"] = enhanced


@container
def enhanced_compressed(folder):
    enhanced(folder)
    dataset = pydicom.dcmread(folder / "x")
    dataset.compress(RLELossless, generate_instance_uid=False)
    dataset.save_as(folder / "x")
